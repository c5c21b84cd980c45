"""Networks of other libraries that the rows compare with."""
