"""Contract suites for plug-ins: what an engine, objective or reward from outside must do to be exchangeable."""
