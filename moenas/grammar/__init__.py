"""The grammar of a space file: components with holes, requirements, draws and JSON Schema."""
