"""The script that made the data needs TensorFlow, so that no doctests are looked for in it."""

collect_ignore = ["make_fixture.py"]
