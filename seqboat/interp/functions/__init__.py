"""Black boxes whose insides are known, to score interpreters on (FIND, Schwettmann et al. 2023). All numpy, all from
seeds. `protocol` is what an interpreter is; `numeric` and `symbols` are the functions; `interpreters` need no model."""
