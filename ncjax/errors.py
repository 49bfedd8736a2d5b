"""The one exception that means "the user can fix this"; `main` prints it as a single line and exits with 2."""


class InputError(ValueError):
    """Bad input: names the field, the value it had, and the way out."""

    def __init__(self, field: str, value: object, way_out: str):
        super().__init__(f"{field}: got {value!r}; {way_out}")
