"One plain loop, and what keeps it safe."
