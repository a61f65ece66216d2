"""The contract between operator, trainer and command line: types, rules, defaults, documents."""

GROUP = "tunewright.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
