"""The images of the demo and of the benchmarks: what is in them, and what a container of each does.

Each holds a program that imports much and computes a little. Versions are pinned: figures of different days compare
the same bytes.
"""

from __future__ import annotations

from bench.image import Recipe

COMMAND = ("python3", "/app/main.py")
"""Runs the program of any of these images; its last line is its answer, the same in every run."""

_BASE = ("python3", "bash", "coreutils", "base-files", "libstdc++6", "libgomp1")

_SCIENCE = (
    *("numpy==2.4.6", "pandas==3.1.1", "scipy==1.17.1", "scikit-learn==1.9.1", "joblib==1.6.0"),
    *("narwhals==2.29.0", "cloudpickle==3.1.2", "threadpoolctl==3.8.0", "python-dateutil==4.0.0"),
    *("six==1.17.0", "tzdata==2026.6"),
)

_GIANT = (
    *(
        "tensorflow-cpu==2.21.0",
        "keras==3.15.1",
        "absl-py==2.5.1",
        "astunparse==1.6.3",
        "certifi==2026.10.18",
    ),
    *("charset-normalizer==3.5.2", "flatbuffers==25.12.19", "gast==0.7.0", "google-pasta==0.2.0"),
    *("grpcio==1.85.1", "h5py==3.14.0", "idna==3.20", "libclang==18.1.1", "markdown-it-py==4.3.0"),
    *("mdurl==0.1.2", "ml-dtypes==0.6.0", "namex==0.1.0", "opt-einsum==3.4.0", "optree==0.20.0"),
    *("packaging==26.3", "protobuf==7.36.2", "Pygments==2.21.0", "requests==2.34.2", "rich==15.0.0"),
    *("setuptools==84.2.1", "termcolor==3.3.0", "typing-extensions==4.16.0", "urllib3==2.8.0"),
    *("wheel==0.48.0", "wrapt==2.5.2"),
)

_DEMO_PROGRAM = """\
import pandas, pyarrow.parquet, scipy.stats, sklearn.ensemble
import numpy
frame = pandas.DataFrame({"x": numpy.arange(1000.0), "y": numpy.arange(1000) % 2})
model = sklearn.ensemble.RandomForestClassifier(5, random_state=1).fit(frame[["x"]], frame["y"])
print("right answers:", int((model.predict(frame[["x"]]) == frame["y"]).sum()))
"""

DEMO = Recipe(
    name="science",
    packages=_BASE,
    wheels=((*_SCIENCE, "pyarrow==26.0.1"),),
    files=(("app/main.py", _DEMO_PROGRAM),),
    weights=80 << 20,
)
"""The image of the demo: more than 200 MiB compressed."""

_LARGE_PROGRAM = """\
import time
print("began", time.time(), flush=True)
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow, pandas, sklearn
print("imported", len(tensorflow.__version__) > 0, len(pandas.__version__) > 0, len(sklearn.__version__) > 0)
"""

LARGE = Recipe(
    name="large",
    packages=_BASE,
    wheels=(_SCIENCE, _GIANT),
    files=(("app/main.py", _LARGE_PROGRAM),),
    weights=300 << 20,
)
"""The image of the benchmarks: more than 500 MiB compressed and 20,000 files, of which a run needs some thousand. Its
program says on its first line when it began, in seconds since the epoch."""
