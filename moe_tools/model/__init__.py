"""What a converted model is made of: the nouns."""
