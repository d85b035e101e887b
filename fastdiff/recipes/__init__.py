"""The recipe of a picture: all that is needed to make it again, kept in the picture as text."""
