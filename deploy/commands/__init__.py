"""The commands of `everdraft`, one file each; every one imports what it needs when it runs."""
