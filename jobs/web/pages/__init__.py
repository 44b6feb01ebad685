"""The page for people: the functions of our API, as HTML that needs no other site."""
