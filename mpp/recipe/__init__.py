"""Recipes: YAML files and command-line overrides over frozen dataclasses. Nothing here imports torch to read one."""

from mpp.recipe.check import RecipeError
from mpp.recipe.load import list_recipes, load_recipe, load_section, save_recipe
from mpp.recipe.recipe import Recipe

__all__ = ["Recipe", "RecipeError", "list_recipes", "load_recipe", "load_section", "save_recipe"]
