"""A run's directory: where everything lies, what is finished and from which inputs, who is at work
there, and files that appear whole.
"""
