"""One battery of tests a family, run for every member that is found in the catalogue.

A family is a predicate on public names (`families.FAMILIES`): whatever a technique exports that satisfies it is a
member and faces the battery ``test_<family>.py``. A member's sample arguments stand in its own test file::

    CONTRACT = {"Dropout": lambda: Sample(Dropout(0.3), (torch.randn(4, 3),))}

A member without a sample fails, with a message that says what to write.
"""
