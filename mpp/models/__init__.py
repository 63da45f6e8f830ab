"""Encoders: `vit.ViT` and the four small tables it is put together from (stems, mixers, positions, pools)."""
