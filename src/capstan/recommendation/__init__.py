"""recommendation: recommenders with huge embeddings, trained as Persia does: rows late, the network in step.

Source: arXiv 2111.05897.
"""

from capstan.recommendation.admission import Frequency, LeastFrequent, LeastRecent, Probability, TimeToLive
from capstan.recommendation.bags import Bags
from capstan.recommendation.batch_reader import read_bags
from capstan.recommendation.hybrid_embedding import HybridEmbedding, StalenessCounts
from capstan.recommendation.optimizers import Adagrad, Adam, RowWiseAdagrad, Sgd
from capstan.recommendation.table import EmbeddingTable, Lookup, TableCounts

__all__ = [
    "Adagrad",
    "Adam",
    "Bags",
    "EmbeddingTable",
    "Frequency",
    "HybridEmbedding",
    "LeastFrequent",
    "LeastRecent",
    "Lookup",
    "Probability",
    "RowWiseAdagrad",
    "Sgd",
    "StalenessCounts",
    "TableCounts",
    "TimeToLive",
    "read_bags",
]
