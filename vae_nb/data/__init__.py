"Images in, batches out."
