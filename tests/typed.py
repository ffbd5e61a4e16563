"""The checker of types and shapes in tests: `pytest --jaxtyping-packages=lowrank_ref,typed.checked`."""

from beartype import BeartypeConf, beartype

#: beartype, which here takes an int where a float is wanted, as PEP 484 says.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
