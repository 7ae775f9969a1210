"""`python -m mad STAGE …`, the form the workflow's rules use."""

from mad.cli import main

main()
