# Bash completion of qlora

_qlora() {
  local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} verb=${COMP_WORDS[1]} word key value words
  word=${line##*[[:space:]]} # whole, although = ends a word for readline
  COMPREPLY=()
  if [[ $line =~ --config-dir[[:space:]]+[^[:space:]]*$ ]]; then
    compopt -o filenames
    COMPREPLY=($(compgen -d -- "$word"))
    return
  fi
  if [[ $word == *=* ]]; then
    key=${word%%=*} value=${word#*=}
    words=$(__qlora_values "$verb:$key")
    [[ $COMP_WORDBREAKS == *=* ]] && key= || key=$key=
  else
    value=$word key=
    [[ $COMP_CWORD -eq 1 ]] && verb=
    words=$(__qlora_words "$verb")
  fi
  COMPREPLY=($(compgen -P "$key" -W "${words//@/}" -- "$value"))
  if [[ $words == *@* ]]; then
    compopt -o filenames
    COMPREPLY+=($(compgen -P "$key" -f -- "$value"))
  fi
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -F _qlora qlora
