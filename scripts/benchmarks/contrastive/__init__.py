"""The contrastive loss beside others."""
