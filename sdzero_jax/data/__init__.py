"""Where questions come from and in which order."""

from sdzero_jax.data.iterators import epoch_batches, shuffled_batches
from sdzero_jax.data.loading import QuestionsConfig, load_questions
from sdzero_jax.data.overlap import check_overlap, find_overlap, without_overlap
from sdzero_jax.data.packing import first_fit_decreasing, packed_batch, packed_groups, utilisation
from sdzero_jax.data.prepare import known_sets, open_split, prepare_set
from sdzero_jax.data.questions import FieldMapping, read_questions, split_by_id, with_instruction

__all__ = [
    "FieldMapping",
    "QuestionsConfig",
    "check_overlap",
    "epoch_batches",
    "find_overlap",
    "first_fit_decreasing",
    "known_sets",
    "load_questions",
    "open_split",
    "packed_batch",
    "packed_groups",
    "prepare_set",
    "read_questions",
    "shuffled_batches",
    "split_by_id",
    "utilisation",
    "with_instruction",
    "without_overlap",
]
