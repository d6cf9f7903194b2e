"""bert_fast: pretrain BERT as fast as a cluster allows and prove it with MLPerf logs."""

__version__ = "0.1.0"
