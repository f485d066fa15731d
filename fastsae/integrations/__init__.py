"""fastsae behind other libraries' names: a module for each, which imports that library.

None is imported by `import fastsae`, and none is a dependency.
"""
