"""Unified compression of vision transformers (Yu et al., ICLR 2022): heads, columns, neurons and blocks removed."""
