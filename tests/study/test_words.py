from nuclei_d2.study.plan import Model
from nuclei_d2.study.words import recipe


def test_a_recipe_is_a_config_and_what_is_changed_in_it():
    assert recipe(Model("unet", "unet.yaml")) == "`unet.yaml`"
    changed = Model("unet", "unet.yaml", options={"A.B": 1, "C": "x"})
    assert recipe(changed) == "`unet.yaml` with `A.B 1` and `C x`"
