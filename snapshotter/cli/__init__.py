"""The program `soci`: one module per command, and the pull that both it and tests use as a library."""
