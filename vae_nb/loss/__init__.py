"What a reconstruction is punished for, and what a loss really does."
