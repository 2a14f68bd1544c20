"""`--multirun`: one job after another, each in a process of its own, and a table of all of them."""
