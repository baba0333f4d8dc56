import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tests' models are tiny: more threads only get in each other's way
