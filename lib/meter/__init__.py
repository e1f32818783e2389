"""The judge meter: how far a judge can be trusted on this task, measured before anything is trained on its verdicts.

python -m lib.run notebooks/2_reward_inspection.ipynb configs/ace.yaml
"""

from lib.meter.labels import Label, label_sheet, labels
from lib.meter.measure import JudgeMeter, kappa, measure
from lib.meter.readings import Reading

__all__ = ["JudgeMeter", "Label", "Reading", "kappa", "label_sheet", "labels", "measure"]
