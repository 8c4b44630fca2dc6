"""Networks that diffusers and transformers lack. Pure torch: nothing here knows Lightning."""
