"""Any-reference video generation: MAGREF on the Wan 2.1 backbone, in functional JAX."""
