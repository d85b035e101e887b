"""Images as pictures, the recipe in each of them, and what notebooks show."""
