"""Backends for libraries that people already use; each module imports its library.

`import fastsae` imports none of them, and fastsae depends on none of the libraries.
"""
