// Reads the JSON schema of a job: the field of a path, its help and its default.

import { get } from "./api.js";

let loading = null;
export function schema() {
  loading ??= get("schema").catch((error) => { loading = null; throw error; });
  return loading;
}

const named = (whole, ref) => whole.$defs[ref.replace("#/$defs/", "")];

// The schemas that a value may have here: references followed, unions opened.
function choices(whole, found) {
  if (!found) return [];
  if (found.$ref) return choices(whole, named(whole, found.$ref));
  const union = found.anyOf ?? found.oneOf;
  return union ? union.flatMap((each) => choices(whole, each)) : [found];
}

export function recipeOf(whole, recipe) {
  const ref = whole.discriminator?.mapping?.[recipe];
  return ref ? named(whole, ref) : null;
}

// The schema of the field at a path such as ["optimizer", "lr"] of a recipe's job; null if there is none.
export function fieldOf(whole, recipe, path) {
  let here = [recipeOf(whole, recipe)];
  let field = null;
  for (const name of path) {
    field = here.flatMap((each) => (each?.properties?.[name] ? [each.properties[name]] : each?.additionalProperties?.constructor === Object ? [each.additionalProperties] : each?.type === "array" && each.items ? [each.items] : []))[0] ?? null;
    if (!field) return null;
    here = choices(whole, field);
  }
  return field && { field, choices: here };
}

export function fieldsOf(whole, recipe, path) {
  const here = path.length ? fieldOf(whole, recipe, path)?.choices ?? [] : [recipeOf(whole, recipe)];
  return here.flatMap((each) => Object.entries(each?.properties ?? {}));
}

// What a field means: its own words, or those of the block that it holds.
export function about(whole, field) {
  return field.description ?? choices(whole, field).map((each) => each.description).find(Boolean) ?? "";
}

// What a field takes, in a few words.
export function kind(whole, field) {
  const words = choices(whole, field).map((each) => {
    if (each.enum) return each.enum.map((value) => JSON.stringify(value)).join(", ");
    if (each.const !== undefined) return JSON.stringify(each.const);
    const least = each.minimum ?? (each.exclusiveMinimum !== undefined ? `above ${each.exclusiveMinimum}` : undefined);
    const most = each.maximum ?? (each.exclusiveMaximum !== undefined ? `below ${each.exclusiveMaximum}` : undefined);
    const range = least !== undefined && most !== undefined ? ` ${least} to ${most}` : least !== undefined ? ` from ${least}` : most !== undefined ? ` to ${most}` : "";
    return { string: "text", integer: "whole number", number: "number", boolean: "true or false", object: "block", array: "list", null: "null" }[each.type] + range;
  });
  return [...new Set(words)].join(", or ");
}

// The leaves of a JSON value, as [path, value]; an empty list or block is a leaf.
export function leaves(value, path = []) {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
    return Object.entries(value).flatMap(([name, inner]) => leaves(inner, [...path, name]));
  }
  return [[path, value]];
}

export const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
