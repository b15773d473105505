"What a model learned, and what to do with it."
