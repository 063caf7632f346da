"""The command line and what a person sees; commands parse, call and print."""
