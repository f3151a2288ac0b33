"""The sections of the ledger, in the order of its report."""

from experiments.claims.named import NAMED
from experiments.claims.networks import NETWORKS
from experiments.claims.operations import OPERATIONS
from experiments.claims.position import POSITION
from experiments.claims.trained import POSITION_STUDY, TRAINED

SECTIONS = (OPERATIONS, NETWORKS, POSITION, POSITION_STUDY, TRAINED, NAMED)
