"""The folder that is put in front of `PYTHONPATH`, so that Python runs its `sitecustomize` first."""
