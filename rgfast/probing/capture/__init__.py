"""What a forward of a watched model puts out: layers, batches and what their entries mean."""
