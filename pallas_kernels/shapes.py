"""Shape checks of the public functions: what was got, what was expected."""


def check_shape(name: str, array, axes: str, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `array` has the shape `expected`, whose axis letters are `axes`."""
    if tuple(array.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected [{axes}] = {tuple(expected)}")


def check_rank(name: str, array, axes: str) -> None:
    """Raise ValueError unless `array` has as many axes as there are axis letters."""
    if array.ndim != len(axes.split()):
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected [{axes}]")


def check_divides(divisor_name: str, divisor: int, name: str, number: int) -> None:
    """Raise ValueError unless `number` is a multiple of `divisor`."""
    if divisor < 1 or number % divisor:
        raise ValueError(f"{name}: got {number}, expected a multiple of {divisor_name} = {divisor}")
