"""What a recipe says: its file, its layers and lines, the components it names, and the objects they become."""
