"""The error of evaluations: a setting, a task, local data or a prompt that cannot be used."""


class EvaluateError(ValueError):
    """Names the key or file, the value, the rule and the mend."""
