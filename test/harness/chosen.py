"""Which tests of a module will run: what they wait for can then start together, one for every core."""


def chosen_tests(request):
    """The tests (pytest.Item) of the module of a fixture's ``request``."""
    return [item for item in request.session.items if item.path == request.path]


def chosen_values(request, parameter):
    """The values of a parameter in these tests, in their order, each once."""
    params = [getattr(item, "callspec", None) and item.callspec.params for item in chosen_tests(request)]
    return list(dict.fromkeys(each[parameter] for each in params if each and parameter in each))
