"""What a converted FFN is made of: experts, routers, selectors, routing."""
