"""verl on Ray: the same rows, scorer and config for verl's own trainer, in an environment of its own.

Owns the way there (`parquet`, `overrides`, `check`, `environment`) and what verl loads (`plugin`, `reward`,
`advantage`, `agent_loop`, `platform`). Only the latter may import verl, Ray and torch.

    python -m lib.run export-verl configs/ace.yaml
"""
