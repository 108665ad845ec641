"""What decoding needs of a model, and GPT: configuration, cache, layers, quantized weights."""
