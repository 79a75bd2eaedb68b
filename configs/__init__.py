"""The YAML files that ``train.py`` layers with ``-c``; ``importlib.resources.files(__name__)`` finds them."""
