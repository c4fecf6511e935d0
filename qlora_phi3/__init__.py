"""Fine-tune Microsoft's Phi-3 family with QLoRA on one consumer GPU."""
