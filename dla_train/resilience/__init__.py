"""What a run does when it is asked to stop, when its numbers go wrong, and when it hangs (docs/reliability.md).

Every decision is taken by all ranks at the same step from numbers that are equal on all of them.
"""
