"""Words for what a JSON value is, for errors about files that people wrote."""


def kind_of(value: object) -> str:
    """Return what a JSON value is, for an error."""
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null", dict: "an object"}
    return kinds.get(type(value), "a number")


def content_of(value: object) -> str:
    """Return what a whole file is whose JSON or YAML has this value: YAML of comments alone has none."""
    return "the file is empty" if value is None else f"this is {kind_of(value)}"
