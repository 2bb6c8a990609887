"""One differentiable forward with weights as arguments. What is kept between two tokens belongs to ``engine``."""
