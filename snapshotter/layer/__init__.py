"""The files of one layer: tree, span states, blob and data, and the messages that are about them."""
